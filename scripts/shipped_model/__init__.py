"""The pieces that make moepack's shipped model: corpus, tokenizer, training, model card."""
