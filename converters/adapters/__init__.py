"""LoRA adapters: what they mean, and one module per format that holds them."""
