"""Making data sets: the commands behind `megaclass data ...`.

Each source has one function that writes a complete data set folder and returns a `PreparationReport`:
`glyphs.make_glyphs` renders installed fonts, `strips.import_strips` reads a zip of tile strips, `images.import_images`
a folder or zip with a folder per class, `import_list.import_list` the images that a list names,
`import_records.import_records` a RecordIO file (`recordio`), `verification_bin.import_pairs` pairs to be verified
(`pickled`). All of them decide classes and order first (`split`, `plans`), then write through `writer.DatasetWriter`,
the only file that knows the format on disk, which keeps what an interrupted run has completed (`unfinished`). Images
are read and encoded in several processes (`storing`, `processes`). `options` describes what all sources take.
`verify.verify` reads a folder back as untrusted data.
"""
