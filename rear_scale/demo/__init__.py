"""The demo: data, tokenizer, training, sampling and evaluation on handwritten digits."""
