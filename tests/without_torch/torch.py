"""Stands before torch in the processes that the tests start: users have none.

tensorboardX would spend two seconds of each on importing it.
"""

raise ImportError("The tests' processes run without torch, as users do.")
