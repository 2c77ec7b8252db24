"""`python -m chameleon.cli`, for torchrun."""

from chameleon.cli.main import main

main()
