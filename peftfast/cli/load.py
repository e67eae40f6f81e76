"""How evenly a mixture of experts was used: the log of a training run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator


class Recorded:
    """Where the tokens of a run went so far.

    Args:
        counted: an ExpertProfile.
        drain: gives what is not in it yet, by the name of the experts' module.
    """

    def __init__(self, counted, drain: Callable[[], dict] = dict) -> None:
        self._counted, self._drain = counted, drain
        self._drain()  # from here on it counts anew

    def profile(self):
        """Return all that was counted, as an ExpertProfile."""
        for name, tokens in self._drain().items():
            self._counted.tokens[name] = self._counted.tokens.get(name, 0) + tokens.cpu()
        return self._counted

    def state(self) -> dict:
        """Return it for JSON."""
        profile = self.profile()
        return {
            kind: {name: counts.tolist() for name, counts in getattr(profile, kind).items()}
            for kind in ("tokens", "gate_mass")
        }

    def restore(self, *states: dict) -> None:
        """Go on counting from the sum of states."""
        import torch

        self._drain()
        for kind, dtype in (("tokens", torch.int64), ("gate_mass", torch.float64)):
            held = getattr(self._counted, kind)
            for counts in held.values():
                counts.zero_()
            for state in states:
                for name, counts in state[kind].items():
                    held[name] = held.get(name, 0) + torch.tensor(counts, dtype=dtype)


@contextlib.contextmanager
def recorded(model) -> Iterator[Recorded | None]:
    """Yield a Recorded that counts inside the block where the model's tokens go; None without experts.

    Args:
        model: of PEFT; the experts are those of its mixture of LoRAs, if it has one, else its own.
    """
    from peftfast import ExpertProfile
    from peftfast.cli.experts import experts_of
    from peftfast.integrations.tuners.profile import recording

    if hasattr(model.base_model, "expert_load"):
        yield Recorded(ExpertProfile({}, {}), model.base_model.expert_load)
    elif experts_of(model):
        with recording(model) as profile:
            yield Recorded(profile)
    else:
        yield None


def expert_load(profile) -> dict[str, dict]:
    """Return the load of the experts in an ExpertProfile, layer by layer.

    Returns:
        By the name of the experts' module: "tokens", how many came to each expert; "max_over_mean" of those; "entropy",
        of the tokens' distribution over experts, in nats, at most log(experts); "unused", the experts without a token.
    """
    load = {}
    for name, tokens in profile.tokens.items():
        counts = tokens.tolist()
        total = sum(counts)
        shares = [count / total for count in counts if count]
        load[name] = {
            "tokens": counts,
            "max_over_mean": max(counts) * len(counts) / total if total else 0.0,
            "entropy": sum(share * math.log(1 / share) for share in shares),
            "unused": counts.count(0),
        }
    return load


def describe(load: dict[str, dict]) -> str:
    """Return a sentence on the load: its most uneven layer, and the experts that no token came to."""
    worst = max(load, key=lambda name: load[name]["max_over_mean"])
    least = min(load, key=lambda name: load[name]["entropy"])
    fullest, entropy = load[worst]["max_over_mean"], load[least]["entropy"]
    unused = sum(layer["unused"] for layer in load.values())
    return (
        f"Expert load: the fullest expert had {fullest:.1f} times the mean of its layer ({worst}); "
        f"entropy at least {entropy:.2f} of {math.log(len(load[least]['tokens'])):.2f} nats ({least}); "
        f"{unused} of {sum(len(layer['tokens']) for layer in load.values())} experts without a token."
    )
