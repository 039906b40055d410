"""Tests on several Ray nodes, each a network and process namespace of its own."""
