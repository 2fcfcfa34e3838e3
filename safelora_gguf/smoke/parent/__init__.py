"""The parent's side: a llama.cpp child that is asked, timed, not believed blindly, and started again where it died.

session        one model, asked for as long as it takes; whatever llama.cpp does is told, not raised
outcomes       what came of it
attempts       asking again after a loss
loaded_model   the model that outlasts its children
process        one child, and what it can be asked
wire           its lines and its time limits
replies        what it says, checked
"""
