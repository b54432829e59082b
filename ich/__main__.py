"""`python -m ich` is `ich`."""

from ich.cli import run

if __name__ == "__main__":
    run()
