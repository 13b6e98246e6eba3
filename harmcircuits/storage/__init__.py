"""Files: written whole or not at all, read whole or refused with the fault by name."""
