"""What a gradient costs, and how right it is."""

from thalweg.ledger.cost import Cost, cost, saved_bytes
from thalweg.ledger.fidelity import Fidelity, fidelity
from thalweg.ledger.price import Price, Prices, price

__all__ = ["Cost", "Fidelity", "Price", "Prices", "cost", "fidelity", "price", "saved_bytes"]
