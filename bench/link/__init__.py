"""`python -m bench.link`: whole all-reduces by real processes over slow links."""
