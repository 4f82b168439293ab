"""A page about runs and sweeps: `runs` and `collection` read what they have left, the other modules show it.

    from llmkit.reporting.page import write_page
    write_page(read_report([Path("runs/ranks")]), Path("runs/ranks/report.html"))

Nothing here imports torch, and nothing is written but the page.
"""
