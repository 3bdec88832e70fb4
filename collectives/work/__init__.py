"""Asynchronous collectives: the queue of one rank's end of a group, and the handles of what is in it."""

from gck.collectives.work.handle import Work, WorkQueue, check_async_op, perform, submit

__all__ = ["Work", "WorkQueue", "check_async_op", "perform", "submit"]
