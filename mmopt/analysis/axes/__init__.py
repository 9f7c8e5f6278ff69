"""Which axes of which tensors are coupled: what has to be cut together, and why something cannot be cut."""

from mmopt.analysis.axes.find import find_groups
from mmopt.analysis.axes.group import Count, Group, Mixing, Place, Positions, Role, Site

__all__ = ["Count", "Group", "Mixing", "Place", "Positions", "Role", "Site", "find_groups"]
