"""A study: a grid of cases x seeds through the real trainer, and from it one table and the plots.

`spec.py` is what a study file may say, `cases.py` makes the wanted runs of it, `runs.py` trains those that are not
there yet, `table.py` and `plots.py` show what came out, and `command.py` is the order of these things. This file
imports nothing, so that its text is free to show.
"""

USAGE = """\
a complete study file, `losses.yaml`:

  base: ../configs/demo.yaml              # a configuration of `megaclass train`; the path counts from this file
  seeds: [0, 1, 2]                        # every case is trained once with each, as train.seed
  settings:                               # of every run, on top of base; null takes an option back to its default
    train.steps: 600
    train.checkpoint_every: 600
    evaluate.baselines: false
  cases:
    - name: softmax                       # has no sampling rate: a dashed line in the plot over it
      settings: {classifier.preset: softmax, classifier.sampling_rate: null}
      labels: {loss: softmax}             # free keys that plots can use
    - name: d-softmax-k
      settings: {classifier.preset: d-softmax-k}
      vary: {classifier.sampling_rate: [0.016, 0.0625, 0.25]}   # one case each: `d-softmax-k sampling_rate=0.016`, ...
      labels: {loss: D-Softmax-K}         # with several options here: all combinations
  metrics:
    - retrieval.recall_at_1               # a path in `evaluation.trained` of summary.json
    - name: verification.tar_at_far.1e-3  # the same, and how it is shown; better and percent follow from the name
      title: TAR at FAR 1e-3
      better: higher                      # or lower, or none: the best of the column is bold
      percent: true
    - log.positive_cosine                 # mean over the last tenth of the lines of metrics.jsonl
  plots:
    - file: rates.svg
      title: Sampled negatives
      x: classifier.sampling_rate         # an option, a label or one of the metrics
      y: retrieval.recall_at_1            # one of the metrics
      lines: loss                         # an option, a label, or `case`
      log_x: true
      points_labelled: false

  megaclass study losses.yaml --out runs/losses

Null takes optim.clip_norm to none. Paths in base, such as dataset.path, count from where the command runs, as for
`megaclass train`. In DIR: table.json, table.md, the plots, study.yaml, and runs/CASE/seed-N/, each an ordinary run
directory with the run's own output in output.log. Every run is one process with one thread. The same command trains
what is missing and nothing else; a run that was stopped continues. A run made with other options is refused.

Exit codes: 0 all there, 1 runs are missing or have failed (the table says which), 2 the study or a metric is wrong,
3 data, 75 told to stop (SIGINT, SIGTERM, SIGHUP) and the runs saved.
"""
