package spool

// Limit applies the lanes' limits, as housekeeping does each second.
func (s *Spool) Limit() error {
	for _, l := range s.lanes {
		if err := s.limit(l); err != nil {
			return err
		}
	}
	return nil
}
