"""The figures of the page. The only importers of matplotlib."""
