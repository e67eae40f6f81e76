"""The one exception that the command line turns into a sentence, and what errors of others say."""

# How torch on the CPU and on a GPU, and peftfast's operators, say that there is no memory left.
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")


class UserError(Exception):
    """Something the user can put right. Its text is one sentence, shown alone on stderr with exit code 2."""


class MethodError(UserError):
    """What was asked for goes with other methods than this one."""


def first_sentence(error: BaseException) -> str:
    """Return the first non-empty line of an error of another library, for use inside a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was no memory left, of the process or of a GPU."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OUT_OF_MEMORY)
