"""`python -m farcli`."""

from farcli.cli.main import main

main()
