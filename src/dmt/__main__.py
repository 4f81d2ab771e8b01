"""Run `dmt` as `python -m dmt`."""

from dmt import signals

if __name__ == "__main__":
    signals.exit_on_signal()  # before the imports that take time
    from dmt.cli.main import run

    run()
