"""The plots of the benchmarks, from the tables in benchmarks/results."""


def draw_all() -> None:
    pass
