// What other files ask of attention.cpp: checks, and one task of a call at a time, by a thread of theirs.
#pragma once
#include "attention.h"

bool attention_sizes_fit(const AttentionCall& c);
bool attention_rows_fit(const AttentionCall& c);  // used, base and len, none of which is null; sizes fit

int64_t attention_tasks(const AttentionCall& c);
int64_t attention_floats(const AttentionCall& c);                        // that a task works with, from a line's start
void attention_task(const AttentionCall& c, int64_t i, float* work);     // pointers are given, and the rows fit
