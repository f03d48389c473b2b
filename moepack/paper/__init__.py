"""A published paper's settings, rebuilt and replayed."""
