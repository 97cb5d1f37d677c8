"""Benchmarks: what a step of the class layer costs in time and memory, beside its floor and beside other heads.

`case.py` says what is measured, `heads.py` our head, `others.py` those of torch and of the public Partial-FC,
`measure.py` times and weighs them on a rank and measures what it can do at best, `ranks.py` runs ranks as processes,
`head.py` puts their answers together, `parts.py` times samplers and optimizers alone, `step.py` takes whole steps
apart, `table.py` and `plot.py` show it. But for the last three nothing of these needs more than torch and numpy, so
that it runs on a bare GPU machine.

`data.py` compares the readers, `sources.py` are its rows, `processes.py` weighs them with their workers.
"""
