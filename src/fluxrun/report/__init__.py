"""Reads run folders and compares them: rows, tables, plots, one page. It never draws."""
