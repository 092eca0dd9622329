"""How forecasters are fitted: solved from sums (`solving`), or by gradient (`descent`)."""
