"""Runs everything that needs a GPU in two commands of a few minutes: ``python -m bench.gpu --plan first``.

``plans.py`` defines the tasks and their time limits, ``supervisor.py`` runs them in child processes and ends
those that exceed their time, and ``child.py`` is the child process. The tasks are in ``smoke.py``
(correctness), ``cases.py`` (speed), ``tuning.py``, ``trainers.py`` and ``commands.py`` (users' commands).
"""
