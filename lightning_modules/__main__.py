"""`python -m lightning_modules`: the `emmdit` command, for launchers such as torchrun."""

from lightning_modules.commands.main import main

if __name__ == "__main__":
    main()
