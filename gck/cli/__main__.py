from gck.cli import app

app(prog_name="gck")
