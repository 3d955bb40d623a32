"""Stands before torch in the processes that the tests start: users have none."""

raise ImportError("The tests' processes run without torch, as users do.")
