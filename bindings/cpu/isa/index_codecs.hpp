#pragma once

#include "cpu/isa/leaves.hpp"

namespace gck::GCK_ISA {

void elias_fano_low(const EliasFano& job, Range entries);
uint64_t elias_fano_high(const EliasFano& job, Range entries, Range words, uint64_t bits);
int64_t elias_fano_count(const EliasFano& job, Range words);
bool elias_fano_select(const EliasFano& job, Range words, int64_t rank);
void block16_split(const void* indices, bool wide, int64_t count, uint16_t* locals);
bool block16_join(const uint16_t* locals, int64_t count, int64_t base, void* indices, bool wide);

}  // namespace gck::GCK_ISA
