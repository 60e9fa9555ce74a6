"""The paper's tables and more, measured on any model and image folder, batch by batch.

An evaluation is a `Plan`: rows of a table, each measured on the same batches. A task is one row on one batch. Its
values are appended to `results.jsonl` as soon as they are there, so that an evaluation that was stopped goes on where
it was, and yields the same table. Files of its folder:

    plan.json       what is measured; another plan is refused
    results.jsonl   one finished task a line: {"row", "batch", "values"} (or "error", which is tried again next time)
    results.json    the table: {"command", "config", "rows": [{"name", "n", "mean", "stderr", …}]}
    results.csv     the same, one line a row
    figure.html     the same, drawn; figure.json is Plotly's own form

`plan` says what is measured, `tasks` measure it over a `bench`, `running` has them done and a `ledger` keep them, and
`table` sums up.
"""
