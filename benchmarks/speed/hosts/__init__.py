"""Every registered method in every host: is it the same there, and what does it cost?"""
