"""The engine in torch ops, for any device that torch runs on."""
