"""Full-parameter fine-tuning of Hugging Face models with DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
