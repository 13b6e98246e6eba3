"""The shipped organisms: tiny language models, trained or compiled, whose harm is abstract."""
