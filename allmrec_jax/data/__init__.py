"""Raw files -> prepared data set -> memory-mapped arrays -> batches.

`sources` fetches named data sets and weights, `movielens` reads raw files, `recipes` filters them, `prepare` writes a
prepared data set, `dataset` opens one in milliseconds, `batches` cuts batches from it. Only the first four steps need
polars; `dataset` and `batches` import without it.
"""
