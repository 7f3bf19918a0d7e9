package bridge

// suspicion finds the message that an upstream cannot stand: MQTT 3.1.1 has no way to refuse one but
// to end the connection, and such a message would come again for ever and hold up all that is behind it.
//
// A connection that the upstream itself ends with nothing acked is a kick. After probeAfter of them
// with the same send at the head, all that was in flight is under suspicion: it goes one by one, each only when
// the one before is acked. A send that is kicked while it is alone in flight is the cause; a batch is then cut
// into its records. A record that is kicked limit times is parked.
//
// Time-outs and links that break on the way are no kicks: no message is to blame for them.
type suspicion struct {
	limit int
	kicks int
	lane  int
	seq   uint64   // the suspect's first record
	until []uint64 // by lane: sequences below are under suspicion; nil: none is
}

const probeAfter = 3

// kicked counts a connection that the upstream ended while the send from seq was the oldest unacked.
// acked: it had acked others before. sent is up to where each lane has been sent.
func (s *suspicion) kicked(lane int, seq uint64, acked bool, sent []uint64) {
	if s.until == nil && acked {
		s.kicks = 0
		return
	}
	if s.lane != lane || s.seq != seq {
		s.lane, s.seq, s.kicks = lane, seq, 0
	}
	if s.kicks++; s.until == nil && s.kicks >= probeAfter {
		s.until = sent
	}
}

// probing tells whether only one send may be in flight.
func (s *suspicion) probing() bool { return s.until != nil }

// suspects tells whether a lane's record is to be sent alone.
func (s *suspicion) suspects(lane int, seq uint64) bool { return s.until != nil && seq < s.until[lane] }

// convicts tells whether the record is to be parked.
func (s *suspicion) convicts(lane int, seq uint64) bool {
	return s.kicks >= s.limit && s.lane == lane && s.seq == seq
}

// clear ends the suspicion: all that was in flight has an outcome.
func (s *suspicion) clear() { s.until, s.kicks = nil, 0 }
