"""How a plan is started: the flags of its run, the command on one machine, and the texts for launchers."""
