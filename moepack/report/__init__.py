"""What people see: tables for the terminal. Records come in; renderables go out.

Tables have no frames, so that they stay readable in a file or a mail; a terminal adds colour.
"""
