"""`python -m meshq` is `meshq`."""

from meshq.cli import main

main()
