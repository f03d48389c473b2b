"""The runtime: executes packed models."""
