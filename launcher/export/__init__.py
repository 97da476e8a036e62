"""The Hugging Face folder of a checkpoint, its comparison with the trained model, its card and push; open hf_folder.py first."""
