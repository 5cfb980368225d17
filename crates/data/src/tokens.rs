//! Rendered text to tokens with byte ranges and origins (placeholder until the tokenizer lands).
