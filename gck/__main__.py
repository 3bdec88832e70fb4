"""`python -m gck`, the command line."""

from gck.cli import app

app(prog_name="gck")
