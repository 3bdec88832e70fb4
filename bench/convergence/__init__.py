"""What each compressor costs a training in loss and in steps: a language model, by several seeds."""
