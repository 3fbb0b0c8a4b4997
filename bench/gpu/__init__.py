"""Everything that only a GPU can show, in two commands of minutes: ``python -m bench.gpu --plan first``.

``plans.py`` says what is done and how long it may take, ``supervisor.py`` runs it in processes that it ends
when their time is over, ``child.py`` is such a process. What the tasks are: ``smoke.py`` (is it right),
``cases.py`` (how fast), ``tuning.py``, ``trainers.py``, ``commands.py`` (as a user types it).
"""
