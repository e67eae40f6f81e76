"""Methods of fine-tuning that peftfast adds to PEFT: get_peft_model, save_pretrained and from_pretrained know them.

Importing this package registers them with PEFT; importing peftfast does so as soon as PEFT is imported.
"""

from peftfast.integrations.tuners import bottleneck, expert_lora, mixture_lora

__all__ = ["bottleneck", "expert_lora", "mixture_lora"]
