"""`python -m vlp_plugins` is `vlp`: for `torchrun --nproc-per-node 2 -m vlp_plugins prune ...`."""

from vlp_plugins.cli.program import main

if __name__ == "__main__":
    main(prog_name="vlp")
