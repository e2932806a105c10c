"""SPELL self-play reinforcement learning on Megatron-Core and vLLM."""

__version__ = "0.3.0.dev0"
