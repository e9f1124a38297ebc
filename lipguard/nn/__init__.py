"""Trainable modules with built-in Lipschitz bounds. Ordinary `nn.Module`s; `lipguard.bound` reads each of them."""

from lipguard.nn.activations import GroupSort, Householder, MaxMin
from lipguard.nn.equilibrium import ContractiveEquilibrium, LipschitzEquilibrium
from lipguard.nn.relu_theta import ReLUTheta

__all__ = ["ContractiveEquilibrium", "GroupSort", "Householder", "LipschitzEquilibrium", "MaxMin", "ReLUTheta"]
