"""Speaks the OpenAI protocol to anything that answers chats."""
