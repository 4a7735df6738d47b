"""Gradients of single batches as the rows of a matrix, within the memory that there is."""

from vlp_plugins.rows.columns import Columns
from vlp_plugins.rows.gathering import gradient_rows
from vlp_plugins.rows.needs import RowPlan
from vlp_plugins.rows.plan import plan_rows

__all__ = ["Columns", "RowPlan", "gradient_rows", "plan_rows"]
